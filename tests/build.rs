//! Generates the clients of `proto/`, without a `protoc` on the machine.

use std::error::Error;

/// CRI, and containerd's own service for tasks.
const PROTOS: [&str; 2] = ["proto/cri.proto", "proto/tasks.proto"];

fn main() -> Result<(), Box<dyn Error>> {
    for proto in PROTOS {
        println!("cargo::rerun-if-changed={proto}");
    }
    let descriptors = protox::compile(PROTOS, ["proto"])?;
    tonic_prost_build::configure().build_server(false).compile_fds(descriptors)?;
    Ok(())
}
