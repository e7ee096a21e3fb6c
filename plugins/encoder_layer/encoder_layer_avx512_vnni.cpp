// EncoderLayer's phases compiled for AVX-512 with VNNI.
#include "encoder_layer_phases.h"

namespace convbert {

extern LayerPhases const kLayerPhasesAvx512Vnni;
LayerPhases const kLayerPhasesAvx512Vnni = kPhases;

}  // namespace convbert
