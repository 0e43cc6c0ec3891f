//! engobe-testkit
