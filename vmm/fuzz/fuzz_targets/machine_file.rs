//! The machine file, as TOML and as JSON.
#![no_main]

use caisson_vmm::{machine::MachineShape, machine_file};
use caisson_vmm_api::config::MachineConfig;
use libfuzzer_sys::fuzz_target;

fuzz_target!(|text: &str| {
    let parsed = [toml::from_str(text).ok(), serde_json::from_str(text).ok()];
    for config in parsed.into_iter().flatten() {
        let config: MachineConfig = config;
        // What passes the check must not fail where it is used.
        if machine_file::check(&config).is_ok() {
            machine_file::command_line(&config).expect("a command line");
            let _ = MachineShape::from(&config);
        }
    }
});
