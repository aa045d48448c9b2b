//! The options that containerd's configuration has for a runtime handler.
//!
//! containerd hands on the table `options` of a handler: either the path of a configuration file (`ConfigPath`), or,
//! without one, the table itself as text. It comes to `start` on standard input.

use containerd_shim_protos::bootstrap_api::BootstrapParams;
use containerd_shim_protos::protobuf::Message as _;
use containerd_shim_protos::protobuf::well_known_types::any::Any;
use prost::Message;

/// The end of the type's name; what is before it differs between containerd's versions.
const TYPE: &str = "runtimeoptions.v1.Options";

/// containerd's `runtimeoptions.v1.Options`.
#[derive(Clone, PartialEq, Eq, Message)]
pub struct RuntimeOptions {
    /// The type of the body.
    #[prost(string, tag = "1")]
    pub type_url: String,
    /// The path of a file.
    #[prost(string, tag = "2")]
    pub config_path: String,
    /// The table itself, in TOML.
    #[prost(bytes = "vec", tag = "3")]
    pub config_body: Vec<u8>,
}

/// Why there are no options.
#[derive(Debug, thiserror::Error)]
pub enum OptionsError {
    /// What came is no message.
    #[error("read them")]
    Envelope(#[from] containerd_shim_protos::protobuf::Error),
    /// The message in it is another.
    #[error("read {TYPE}")]
    Decode(#[from] prost::DecodeError),
    /// Options in another form.
    #[error("they are not text")]
    Text(#[from] std::string::FromUtf8Error),
}

/// What a handler's options say of the configuration.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum HandlerConfig {
    /// A file.
    Path(String),
    /// The text of one.
    Text(String),
}

impl HandlerConfig {
    /// From what containerd writes to standard input; empty: none. Options of runc's are none, either: containerd 2
    /// makes them up for containers of any runtime.
    ///
    /// # Errors
    /// When they can't be read.
    pub fn from_stdin(bytes: &[u8]) -> Result<Option<HandlerConfig>, OptionsError> {
        let any = Any::parse_from_bytes(bytes)?;
        if !any.type_url.ends_with(TYPE) {
            return Ok(None);
        }
        let options = RuntimeOptions::decode(&*any.value)?;
        Ok(if !options.config_path.is_empty() {
            Some(HandlerConfig::Path(options.config_path))
        } else if !options.config_body.is_empty() {
            Some(HandlerConfig::Text(String::from_utf8(options.config_body)?))
        } else {
            None
        })
    }

    /// From the parameters of a containerd that says all in one message.
    ///
    /// # Errors
    /// When the options in it can't be read.
    pub fn from_params(params: &BootstrapParams) -> Result<Option<HandlerConfig>, OptionsError> {
        let values = params.extensions.iter().filter_map(|extension| extension.value.as_ref());
        match values.into_iter().find(|any| any.type_url.ends_with(TYPE)) {
            Some(any) => HandlerConfig::from_stdin(&any.write_to_bytes()?),
            None => Ok(None),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use containerd_shim_protos::bootstrap_api::Extension;
    use containerd_shim_protos::protobuf::MessageField;

    fn any(type_url: &str, options: &RuntimeOptions) -> Any {
        Any { type_url: type_url.into(), value: options.encode_to_vec(), ..Any::default() }
    }

    fn read(type_url: &str, options: &RuntimeOptions) -> Result<Option<HandlerConfig>, OptionsError> {
        HandlerConfig::from_stdin(&any(type_url, options).write_to_bytes().unwrap())
    }

    #[test]
    fn a_path_comes_before_a_text_and_nothing_is_fine() {
        let path = RuntimeOptions { config_path: "/etc/x.toml".into(), ..RuntimeOptions::default() };
        let both = RuntimeOptions { config_body: b"a = 1".to_vec(), ..path.clone() };
        let text = RuntimeOptions { config_path: String::new(), ..both.clone() };
        for name in ["runtimeoptions.v1.Options", "containerd.runtimeoptions.v1.Options"] {
            assert_eq!(read(name, &both).unwrap(), Some(HandlerConfig::Path("/etc/x.toml".into())));
            assert_eq!(read(name, &text).unwrap(), Some(HandlerConfig::Text("a = 1".into())));
            assert_eq!(read(name, &RuntimeOptions::default()).unwrap(), None);
        }
        assert_eq!(HandlerConfig::from_stdin(b"").unwrap(), None);
        assert_eq!(read("containerd.runc.v1.Options", &both).unwrap(), None);
        let extension = Extension { value: MessageField::some(any(TYPE, &path)), ..Extension::default() };
        let params = BootstrapParams { extensions: vec![extension], ..BootstrapParams::default() };
        let read = HandlerConfig::from_params(&params).unwrap();
        assert_eq!(read, Some(HandlerConfig::Path("/etc/x.toml".into())));
        assert_eq!(HandlerConfig::from_params(&BootstrapParams::default()).unwrap(), None);
    }

    #[test]
    fn what_is_something_else_is_refused() {
        assert!(matches!(HandlerConfig::from_stdin(b"nonsense"), Err(OptionsError::Envelope(_))));
        let binary = RuntimeOptions { config_body: vec![0xff], ..RuntimeOptions::default() };
        assert!(matches!(read(TYPE, &binary), Err(OptionsError::Text(_))));
    }
}
