//! A mock driver and real unix sockets, with the device between them.

#![allow(clippy::unwrap_used, clippy::panic, reason = "a test fails by it")]
#![cfg_attr(not(test), allow(dead_code, reason = "a part of this serves other crates' tests"))]

mod driver;
#[cfg(test)]
mod endings;
mod exercise;
#[cfg(test)]
mod hostile;
#[cfg(test)]
mod streams;

pub use exercise::exercise_device;
