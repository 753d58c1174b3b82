"""One folder for each way to write kernels; each exports KERNELS. The registry finds them by itself."""
