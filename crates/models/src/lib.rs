//! engobe-models
