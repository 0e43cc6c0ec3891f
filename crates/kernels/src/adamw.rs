//! adamw (being written)
