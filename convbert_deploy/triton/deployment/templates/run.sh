#!/bin/sh
# Starts Triton on this model repository; further arguments go to tritonserver.
#   ./run.sh                 where tritonserver is on the path (the image starts here too)
#   ./run.sh docker [ARGS]   builds the image beside this script and runs it
# HTTP_PORT, GRPC_PORT, METRICS_PORT and MODEL_REPOSITORY override what is below.
set -eu

here=$(CDPATH='' cd -- "$(dirname -- "$0")" && pwd)
http_port=${HTTP_PORT:-@http_port@}
grpc_port=${GRPC_PORT:-@grpc_port@}
metrics_port=${METRICS_PORT:-@metrics_port@}

if [ "${1:-}" = docker ]; then
    shift
    docker build --tag @image@ "$here"
    # Published on loopback alone: Triton asks nobody who they are.
    # The python backend passes tensors through shared memory; Docker's default is 64 MB.
    exec docker run --rm --init \
        --gpus all \  #@gpu
        --read-only --tmpfs /tmp --shm-size 1g \
        --cap-drop ALL --security-opt no-new-privileges \
        --publish "127.0.0.1:$http_port:@http_port@" \
        --publish "127.0.0.1:$grpc_port:@grpc_port@" \
        --publish "127.0.0.1:$metrics_port:@metrics_port@" \
        @image@ "$@"
fi

models=${MODEL_REPOSITORY:-$here/@repository@}
plugins=@plugin_folder@ #@plugin
if [ ! -e "$plugins/@plugin_library@" ]; then #@plugin
    # Triton only logs a library that it cannot open, and then fails on the model. #@plugin
    echo "run.sh: $plugins/@plugin_library@ is missing, which the engine needs" >&2 #@plugin
    exit 3 #@plugin
fi #@plugin

# Explicit control: only these models are loaded, and one whose process died can be unloaded and
# loaded while the server runs.
exec tritonserver \
    --model-repository="$models" \
    --model-control-mode=explicit \
    --load-model=@engine_model@ \
    --load-model=@model@ \
    --http-port="$http_port" \
    --grpc-port="$grpc_port" \
    --metrics-port="$metrics_port" \
    --backend-config=tensorrt,plugins="$plugins/@plugin_library@" \  #@tensorrt_plugin
    "$@"
