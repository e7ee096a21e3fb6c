"""Where an engine's time goes: by operator, by encoder layer, by kernel, and what is not fused."""
