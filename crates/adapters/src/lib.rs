//! engobe-adapters
