// EncoderLayer's phases compiled for AMX with its tiles emulated, for tests.
#include "encoder_layer_phases.h"

namespace convbert {

extern LayerPhases const kLayerPhasesAmxEmulated;
LayerPhases const kLayerPhasesAmxEmulated = kPhases;

}  // namespace convbert
