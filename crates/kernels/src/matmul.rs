//! matmul (being written)
