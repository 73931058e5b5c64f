"""V5, Winograd and products before upsampling, NHWC."""
