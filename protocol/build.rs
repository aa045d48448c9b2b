//! Generates the gRPC types from `proto/` with protox, so that no `protoc` is needed.

fn main() -> Result<(), Box<dyn std::error::Error>> {
    println!("cargo:rerun-if-changed=proto");
    let files = ["agent.proto", "container.proto", "machine.proto"];
    let descriptors = protox::compile(files, ["proto"])?;
    let client = std::env::var_os("CARGO_FEATURE_CLIENT").is_some();
    tonic_prost_build::configure().build_client(client).compile_fds(descriptors)?;
    Ok(())
}
