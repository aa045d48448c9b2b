//! The machine file, as TOML and as JSON.
#![no_main]

use caisson_vmm::{machine::MachineShape, machine_file};
use caisson_vmm_api::config::MachineConfig;
use libfuzzer_sys::fuzz_target;

fuzz_target!(|text: &str| {
    let parsed = [toml::from_str(text).ok(), serde_json::from_str(text).ok()];
    for config in parsed.into_iter().flatten() {
        let config: MachineConfig = config;
        // What passes the check can be used: only a command line that is too long is found later.
        if config.validate().is_ok() {
            let _ = machine_file::command_line(&config);
            let _ = MachineShape::from(&config);
        }
    }
});
