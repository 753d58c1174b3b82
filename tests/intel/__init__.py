"""An Intel GPU that is not here: CPU stand-ins for the ops of vllm-xpu-kernels, and fake tensors on "xpu"."""
