"""One file per runtime; nothing outside this package imports onnxruntime or TensorRT."""
