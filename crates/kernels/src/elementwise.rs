//! elementwise (being written)
