// EncoderLayer's phases compiled for AVX-512 with VNNI and BF16.
#include "encoder_layer_phases.h"

namespace convbert {

extern LayerPhases const kLayerPhasesAvx512Bf16;
LayerPhases const kLayerPhasesAvx512Bf16 = kPhases;

}  // namespace convbert
