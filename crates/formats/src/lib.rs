//! engobe-formats
