//! engobe-train
