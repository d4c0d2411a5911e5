//! The CPU: kernels, thread pool.
