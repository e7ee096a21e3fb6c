"""An engine as a model repository of Triton Inference Server."""
