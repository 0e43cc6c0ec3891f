//! engobe-data
