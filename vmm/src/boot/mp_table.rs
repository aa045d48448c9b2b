//! The MP table (Intel MultiProcessor Specification 1.4): how a kernel without ACPI learns of processors and
//! interrupt routes.
//!
//! Every processor that the machine may ever have is listed as enabled: Linux counts only those as possible.
//! With `maxcpus=` on its command line it starts just the first ones and leaves the others parked.

use caisson_vmm_api::config::MAX_PROCESSORS;
use vm_memory::{Bytes, GuestAddress, GuestMemoryError, GuestMemoryMmap};

use crate::layout::{IOAPIC, LAPIC, MP_TABLE, MP_TABLE_MAX};

/// Interrupt lines of the I/O APIC.
pub const IOAPIC_PINS: u8 = 24;

const SPEC_REVISION: u8 = 4;
/// The version register of KVM's local APIC.
const APIC_VERSION: u8 = 0x14;
/// The version register of KVM's I/O APIC.
const IOAPIC_VERSION: u8 = 0x11;
const CPU_ENABLED: u8 = 1;
const CPU_BOOT: u8 = 2;
/// On-chip APIC and FPU, as CPUID leaf 1's EDX has them.
const CPU_FEATURES: u32 = 0x201;
/// Family 6.
const CPU_SIGNATURE: u32 = 0x600;

const ENTRY_PROCESSOR: u8 = 0;
const ENTRY_BUS: u8 = 1;
const ENTRY_IOAPIC: u8 = 2;
const ENTRY_INTERRUPT: u8 = 3;
const ENTRY_LOCAL_INTERRUPT: u8 = 4;

const INT: u8 = 0;
const NMI: u8 = 1;
const EXT_INT: u8 = 3;
/// Every local APIC.
const ALL_APICS: u8 = 0xff;

const POINTER_LEN: usize = 16;
const HEADER_LEN: usize = 44;

/// Why the table could not be written.
#[derive(Debug, thiserror::Error)]
pub enum MpTableError {
    /// More processors than it can list.
    #[error("{0} processors, at most {MAX_PROCESSORS} fit the MP table")]
    TooManyProcessors(u8),
    /// Guest memory ends before the table.
    #[error("writing the MP table")]
    Write(#[source] GuestMemoryError),
}

/// Writes the table for `processors` processors.
///
/// # Errors
/// When there are too many of them or guest memory is too small.
pub fn write(mem: &GuestMemoryMmap<()>, processors: u8) -> Result<(), MpTableError> {
    if processors == 0 || processors > MAX_PROCESSORS {
        return Err(MpTableError::TooManyProcessors(processors));
    }
    mem.write_slice(&table(processors), GuestAddress(MP_TABLE)).map_err(MpTableError::Write)
}

/// The floating pointer structure, the configuration table's header and its entries.
fn table(processors: u8) -> Vec<u8> {
    let ioapic_id = processors;
    let mut entries = Vec::with_capacity(20 * usize::from(processors) + 256);
    let mut count: u16 = 0;
    let mut push = |entry: &[u8]| {
        entries.extend_from_slice(entry);
        count += 1;
    };
    for id in 0..processors {
        push(&processor(id));
    }
    push(&[ENTRY_BUS, 0, b'I', b'S', b'A', b' ', b' ', b' ']);
    let [a, b, c, d] = IOAPIC.to_le_bytes();
    push(&[ENTRY_IOAPIC, ioapic_id, IOAPIC_VERSION, 1, a, b, c, d]);
    for pin in 0..IOAPIC_PINS {
        push(&[ENTRY_INTERRUPT, INT, 0, 0, 0, pin, ioapic_id, pin]);
    }
    push(&[ENTRY_LOCAL_INTERRUPT, EXT_INT, 0, 0, 0, 0, 0, 0]);
    push(&[ENTRY_LOCAL_INTERRUPT, NMI, 0, 0, 0, 0, ALL_APICS, 1]);

    let mut table = pointer();
    table.extend(header(&entries, count));
    table.extend(entries);
    debug_assert!(table.len() as u64 <= MP_TABLE_MAX);
    table
}

fn processor(id: u8) -> [u8; 20] {
    let mut entry = [0; 20];
    let flags = CPU_ENABLED | if id == 0 { CPU_BOOT } else { 0 };
    entry[..4].copy_from_slice(&[ENTRY_PROCESSOR, id, APIC_VERSION, flags]);
    entry[4..8].copy_from_slice(&CPU_SIGNATURE.to_le_bytes());
    entry[8..12].copy_from_slice(&CPU_FEATURES.to_le_bytes());
    entry
}

fn pointer() -> Vec<u8> {
    let mut pointer = b"_MP_".to_vec();
    let table = u32::try_from(MP_TABLE).unwrap_or_default() + u32::try_from(POINTER_LEN).unwrap_or_default();
    pointer.extend_from_slice(&table.to_le_bytes());
    // Its length in paragraphs, the revision, the checksum, no default configuration.
    pointer.extend_from_slice(&[1, SPEC_REVISION, 0, 0, 0, 0, 0, 0]);
    pointer[10] = checksum(&[&pointer]);
    pointer
}

fn header(entries: &[u8], count: u16) -> Vec<u8> {
    let mut header = b"PCMP".to_vec();
    let len = u16::try_from(HEADER_LEN + entries.len()).unwrap_or(u16::MAX);
    header.extend_from_slice(&len.to_le_bytes());
    header.extend_from_slice(&[SPEC_REVISION, 0]);
    header.extend_from_slice(b"CAISSON MICROVM     ");
    // No OEM table.
    header.extend_from_slice(&[0; 6]);
    header.extend_from_slice(&count.to_le_bytes());
    header.extend_from_slice(&LAPIC.to_le_bytes());
    // No extended entries.
    header.extend_from_slice(&[0; 4]);
    header[7] = checksum(&[&header, entries]);
    header
}

/// The byte that makes the sum of all bytes zero.
fn checksum(parts: &[&[u8]]) -> u8 {
    parts.iter().flat_map(|part| part.iter()).fold(0u8, |sum, byte| sum.wrapping_add(*byte)).wrapping_neg()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sum(bytes: &[u8]) -> u8 {
        bytes.iter().fold(0u8, |sum, byte| sum.wrapping_add(*byte))
    }

    #[test]
    fn both_checksums_are_right_and_lengths_agree() {
        for processors in [1, 2, 8, MAX_PROCESSORS] {
            let table = table(processors);
            assert_eq!(sum(&table[..POINTER_LEN]), 0);
            assert_eq!(sum(&table[POINTER_LEN..]), 0);
            let len = u16::from_le_bytes([table[POINTER_LEN + 4], table[POINTER_LEN + 5]]);
            assert_eq!(usize::from(len), table.len() - POINTER_LEN);
            assert!(table.len() as u64 <= MP_TABLE_MAX);
        }
    }

    #[test]
    fn lists_every_processor_as_enabled_and_one_as_the_one_that_boots() {
        let table = table(4);
        let entries = &table[POINTER_LEN + HEADER_LEN..];
        let flags: Vec<u8> = entries.chunks(20).take(4).map(|entry| entry[3]).collect();
        assert_eq!(flags, [3, 1, 1, 1]);
        let ids: Vec<u8> = entries.chunks(20).take(4).map(|entry| entry[1]).collect();
        assert_eq!(ids, [0, 1, 2, 3]);
    }

    #[test]
    fn routes_every_pin() {
        let table = table(1);
        let interrupts = &table[POINTER_LEN + HEADER_LEN + 20 + 16..];
        for (pin, entry) in interrupts.chunks(8).take(usize::from(IOAPIC_PINS)).enumerate() {
            assert_eq!((entry[0], usize::from(entry[5]), usize::from(entry[7])), (ENTRY_INTERRUPT, pin, pin));
        }
    }

    #[test]
    fn refuses_absurd_counts() {
        let mem = GuestMemoryMmap::from_ranges(&[(GuestAddress(0), 2 << 20)]).unwrap();
        assert!(write(&mem, 0).is_err());
        assert!(write(&mem, 255).is_err());
        write(&mem, MAX_PROCESSORS).unwrap();
    }
}
