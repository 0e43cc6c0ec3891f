//! rope (being written)
