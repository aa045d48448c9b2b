#![allow(clippy::unwrap_used, reason = "a test fails by it")]
#![cfg_attr(not(test), allow(dead_code, reason = "a part of this serves other crates' tests"))]

mod bench;
#[cfg(test)]
mod contents;
mod exercise;
#[cfg(test)]
mod hostile;
#[cfg(test)]
mod operations;

pub use exercise::exercise_workers;
