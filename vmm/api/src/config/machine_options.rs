//! How a machine is made: its kernel's entry and its memory's pages.

use serde::{Deserialize, Serialize};

/// How the kernel is entered.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Protocol {
    /// Linux's 64-bit entry, in an ELF image or a bzImage.
    #[default]
    Linux,
    /// PVH, in an ELF image that carries its note.
    Pvh,
}

/// How pages of guest memory are allocated.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Backing {
    /// Private anonymous memory.
    #[default]
    Anonymous,
    /// A memory file, so that another process may be handed the guest's memory.
    Memfd,
}

/// Whether guest memory uses huge pages.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum HugePages {
    /// Only as the host's own policy has it.
    Off,
    /// Ask for transparent huge pages. A guest's boot touches almost all of what it touches at all close
    /// together: a fault for each 2 MiB instead of each 4 KiB saves a third of all instructions of a boot.
    #[default]
    Transparent,
    /// Take 2 MiB pages from the host's pool.
    Reserved,
}
