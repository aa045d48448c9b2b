//! Options of a network card.

use std::{fmt, str::FromStr};

use serde::{Deserialize, Serialize};

use super::RateLimits;

/// The address of a network card.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct MacAddress([u8; 6]);

/// Why text is not the address of a network card.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum MacError {
    /// Not six pairs of hexadecimal digits with colons between them.
    #[error("a MAC address has the form 02:00:00:00:00:01")]
    Form,
    /// All zeros, or a group's address.
    #[error("a network card's MAC address must be a unicast address")]
    NotUnicast,
}

impl MacAddress {
    /// The address's bytes in the order in which they are written and sent.
    pub fn bytes(self) -> [u8; 6] {
        self.0
    }
}

impl TryFrom<[u8; 6]> for MacAddress {
    type Error = MacError;

    fn try_from(bytes: [u8; 6]) -> Result<Self, MacError> {
        let [first, ..] = bytes;
        if first & 1 != 0 || bytes == [0; 6] { Err(MacError::NotUnicast) } else { Ok(Self(bytes)) }
    }
}

impl FromStr for MacAddress {
    type Err = MacError;

    fn from_str(text: &str) -> Result<Self, MacError> {
        let mut bytes = [0; 6];
        let mut parts = text.split(':');
        for byte in &mut bytes {
            let part = parts.next().filter(|part| part.len() == 2).ok_or(MacError::Form)?;
            let digits = part.bytes().all(|digit| digit.is_ascii_hexdigit());
            *byte = u8::from_str_radix(part, 16).ok().filter(|_| digits).ok_or(MacError::Form)?;
        }
        if parts.next().is_some() {
            return Err(MacError::Form);
        }
        Self::try_from(bytes)
    }
}

impl TryFrom<String> for MacAddress {
    type Error = MacError;

    fn try_from(text: String) -> Result<Self, MacError> {
        text.parse()
    }
}

impl fmt::Display for MacAddress {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let [a, b, c, d, e, g] = self.0;
        write!(f, "{a:02x}:{b:02x}:{c:02x}:{d:02x}:{e:02x}:{g:02x}")
    }
}

impl From<MacAddress> for String {
    fn from(mac: MacAddress) -> Self {
        mac.to_string()
    }
}

/// A network card in the machine file. Its tap device comes as a descriptor beside it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct NetConfig {
    /// The card's address.
    pub mac: MacAddress,
    /// What the guest's driver sets the interface's MTU to; absent: the driver's own default, 1500.
    #[serde(default)]
    pub mtu: Option<u16>,
    /// Limits on what the guest receives.
    #[serde(default)]
    pub receive_limits: RateLimits,
    /// Limits on what the guest sends.
    #[serde(default)]
    pub send_limits: RateLimits,
}
