//! engobe-autograd
