// EncoderLayer's phases compiled for AVX-512.
#include "encoder_layer_phases.h"

namespace convbert {

extern LayerPhases const kLayerPhasesAvx512;
LayerPhases const kLayerPhasesAvx512 = kPhases;

}  // namespace convbert
