//! The `caisson-agent` binary. See the library's documentation for what it is made of.

fn main() {}
