//! attention (being written)
