//! embedding (being written)
