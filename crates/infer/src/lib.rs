//! engobe-infer
