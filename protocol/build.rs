//! Generates the gRPC types from `proto/` with protox, so that no `protoc` is needed.

use std::fmt::Write;

use prost_build::{Service, ServiceGenerator};

fn main() -> Result<(), Box<dyn std::error::Error>> {
    println!("cargo:rerun-if-changed=proto");
    let files = ["agent.proto", "container.proto", "machine.proto"];
    let descriptors = protox::compile(files, ["proto"])?;
    let client = std::env::var_os("CARGO_FEATURE_CLIENT").is_some();
    let tonic = tonic_prost_build::configure().build_client(client).service_generator();
    prost_build::Config::new().service_generator(Box::new(WithMethods(tonic))).compile_fds(descriptors)?;
    Ok(())
}

/// Adds to each service a function that finds a method by its name, for `server`.
struct WithMethods(Box<dyn ServiceGenerator>);

impl ServiceGenerator for WithMethods {
    fn generate(&mut self, service: Service, code: &mut String) {
        let module = service.name.to_lowercase();
        let mut arms = String::new();
        for method in &service.methods {
            assert!(
                !method.client_streaming,
                "{}: clients stream over connections of their own",
                method.name
            );
            let shape = if method.server_streaming { "server_streaming" } else { "unary" };
            let (proto_name, name) = (&method.proto_name, &method.name);
            let _ = writeln!(
                arms,
                "{proto_name:?} => crate::server::{shape}(async move |request| service.{name}(request).await),"
            );
        }
        let _ = write!(
            code,
            "/// The method of `service` with this name.
            pub fn {module}_method<T: {module}_server::{name}>(
                service: std::sync::Arc<T>,
                name: &str,
            ) -> Option<crate::server::Method> {{
                Some(match name {{ {arms} _ => return None }})
            }}",
            name = service.name,
        );
        self.0.generate(service, code);
    }

    fn finalize(&mut self, code: &mut String) {
        self.0.finalize(code);
    }

    fn finalize_package(&mut self, package: &str, code: &mut String) {
        self.0.finalize_package(package, code);
    }
}
