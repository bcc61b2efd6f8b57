"""`ucx`: RDMA, GPUDirect and CUDA IPC by UCX; requests that the owner checks where hardware does not."""
