// EncoderLayer's phases compiled for AMX (bf16 and int8) beside AVX-512.
#include "encoder_layer_phases.h"

namespace convbert {

extern LayerPhases const kLayerPhasesAmx;
LayerPhases const kLayerPhasesAmx = kPhases;

}  // namespace convbert
