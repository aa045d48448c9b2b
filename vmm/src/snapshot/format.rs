//! The state file: a fixed header, then the state in [postcard](https://postcard.jamesmunns.com)'s encoding.
//!
//! | offset | length | holds |
//! |---|---|---|
//! | 0 | 8 | the magic `CAISSON\0` |
//! | 8 | 4 | [`VERSION`] |
//! | 12 | 4 | length of what follows the header |
//! | 16 | 4 | CRC-32 of it |
//!
//! All numbers are little-endian. The version counts changes of the state's structure: no version reads
//! another's.

use super::MachineState;

/// The version that this program writes, and the only one that it reads.
pub const VERSION: u32 = 3;
/// The longest state file: far more than any machine's.
pub const MAX_LEN: u64 = 64 << 20;

const MAGIC: [u8; 8] = *b"CAISSON\0";
const HEADER_LEN: usize = 20;

/// Why a state file is not understood.
#[derive(Debug, thiserror::Error)]
pub enum FormatError {
    /// It begins with something else.
    #[error("not a snapshot of this program")]
    Foreign,
    /// Another version wrote it.
    #[error("snapshot version {0}, this program reads version {VERSION}")]
    Version(u32),
    /// It is shorter or longer than it says.
    #[error("truncated: {got} bytes of state where {expected} should be")]
    Length {
        /// What the header says.
        expected: usize,
        /// What there is.
        got: usize,
    },
    /// Its content has changed.
    #[error("damaged: the checksum does not match")]
    Checksum,
    /// The content is impossible although its checksum is right.
    #[error("damaged: {0}")]
    Content(postcard::Error),
    /// The state could not be encoded.
    #[error("encoding the state")]
    Encode(#[source] postcard::Error),
}

/// A state file's content.
///
/// # Errors
/// When the state is too large for a file.
pub fn encode(state: &MachineState) -> Result<Vec<u8>, FormatError> {
    let mut file = vec![0; HEADER_LEN];
    file = postcard::to_extend(state, file).map_err(FormatError::Encode)?;
    let (header, body) = file.split_at_mut(HEADER_LEN);
    let len =
        u32::try_from(body.len()).map_err(|_| FormatError::Encode(postcard::Error::SerializeBufferFull))?;
    let checksum = crc32fast::hash(body);
    let fields = [&MAGIC[..], &VERSION.to_le_bytes(), &len.to_le_bytes(), &checksum.to_le_bytes()];
    for (to, from) in header.iter_mut().zip(fields.into_iter().flatten()) {
        *to = *from;
    }
    Ok(file)
}

/// Reads a state file's content.
///
/// # Errors
/// When it is not exactly what [`encode`] writes.
pub fn decode(file: &[u8]) -> Result<MachineState, FormatError> {
    let Some((header, body)) =
        file.split_at_checked(HEADER_LEN).filter(|(header, _)| header.starts_with(&MAGIC))
    else {
        return Err(FormatError::Foreign);
    };
    let number = |at: usize| {
        let bytes = header.get(at..at + 4).and_then(|bytes| <[u8; 4]>::try_from(bytes).ok());
        u32::from_le_bytes(bytes.unwrap_or_default())
    };
    let (version, len, checksum) = (number(8), number(12), number(16));
    if version != VERSION {
        return Err(FormatError::Version(version));
    }
    let expected = usize::try_from(len).unwrap_or(usize::MAX);
    if body.len() != expected {
        return Err(FormatError::Length { expected, got: body.len() });
    }
    if crc32fast::hash(body) != checksum {
        return Err(FormatError::Checksum);
    }
    match postcard::take_from_bytes(body).map_err(FormatError::Content)? {
        (state, []) => Ok(state),
        (_, rest) => Err(FormatError::Length { expected: expected - rest.len(), got: expected }),
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn state() -> MachineState {
        MachineState::empty_for_tests()
    }

    #[test]
    fn what_is_written_can_be_read() {
        let file = encode(&state()).unwrap();
        assert_eq!(encode(&decode(&file).unwrap()).unwrap(), file);
    }

    #[test]
    fn another_version_is_refused_by_name() {
        let mut file = encode(&state()).unwrap();
        file[8] += 1;
        assert!(matches!(decode(&file), Err(FormatError::Version(other)) if other == VERSION + 1));
    }

    #[test]
    fn a_foreign_file_is_refused() {
        assert!(matches!(decode(b""), Err(FormatError::Foreign)));
        assert!(matches!(decode(&[0x7f; 4096]), Err(FormatError::Foreign)));
    }

    proptest! {
        #[test]
        fn every_truncation_is_noticed(cut in 0usize..1000) {
            let file = encode(&state()).unwrap();
            let cut = cut % file.len();
            prop_assert!(decode(&file[..cut]).is_err());
        }

        #[test]
        fn every_flipped_bit_is_noticed(at: usize, bit in 0u8..8) {
            let mut file = encode(&state()).unwrap();
            let at = at % file.len();
            file[at] ^= 1 << bit;
            prop_assert!(decode(&file).is_err());
        }

        /// A checksum can be forged: content that is nonsense must still only be an error.
        #[test]
        fn forged_content_never_panics(body: Vec<u8>) {
            let mut file = MAGIC.to_vec();
            file.extend(VERSION.to_le_bytes());
            file.extend(u32::try_from(body.len()).unwrap().to_le_bytes());
            file.extend(crc32fast::hash(&body).to_le_bytes());
            file.extend(body);
            let _ = decode(&file);
        }
    }
}
