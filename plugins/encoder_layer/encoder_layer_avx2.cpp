// EncoderLayer's phases compiled for AVX2.
#include "encoder_layer_phases.h"

namespace convbert {

extern LayerPhases const kLayerPhasesAvx2;
LayerPhases const kLayerPhasesAvx2 = kPhases;

}  // namespace convbert
