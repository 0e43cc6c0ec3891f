//! engobe-nn
