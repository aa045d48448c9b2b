//! The specification's objects out of JSON.
//!
//! All objects are read by one function, which asks them for the place of each member by its name. The parsers that
//! serde would derive, one for each object, would together be a sixth of the agent; and this way an error names the
//! member that is wrong.

use std::collections::BTreeMap;
use std::path::PathBuf;

use serde_json::Value;
use thiserror::Error;

/// Why a text is none of the specification's objects.
#[derive(Debug, Error)]
pub enum ParseError {
    /// It is no JSON.
    #[error("not JSON")]
    Syntax(#[from] serde_json::Error),
    /// A member is not what the specification says.
    #[error("{member}: {reason}")]
    Member {
        /// Its path, as in `process.user.uid`.
        member: String,
        /// What is wrong with it.
        reason: String,
    },
}

/// Reads an object whose members' paths begin with `path`, which is empty for a whole configuration.
pub(super) fn parse<T: Object + Default>(path: &str, text: &[u8]) -> Result<T, ParseError> {
    let mut object = T::default();
    let value = serde_json::from_slice(text)?;
    read_object(&mut object, value).map_err(|misfit| {
        let Misfit { path: member, reason } = if path.is_empty() { misfit } else { misfit.within(path) };
        ParseError::Member { member, reason }
    })?;
    Ok(object)
}

/// A value that does not fit its place.
#[derive(Debug)]
pub(super) struct Misfit {
    path: String,
    reason: String,
}

impl Misfit {
    pub(super) fn new(reason: impl Into<String>) -> Misfit {
        Misfit { path: String::new(), reason: reason.into() }
    }

    /// The same, seen from the object or array that it is in.
    fn within(mut self, name: &str) -> Misfit {
        let dot = if self.path.is_empty() || self.path.starts_with('[') { "" } else { "." };
        self.path = format!("{name}{dot}{}", self.path);
        self
    }
}

/// What a JSON value can be read into.
pub(super) trait Place {
    fn read(&mut self, value: Value) -> Result<(), Misfit>;
}

/// Something with members; see [`members!`].
pub(super) trait Object {
    /// Members that must be there.
    fn required(&self) -> &'static [&'static str];

    /// Where the member `name` goes. None: the specification has no such member, which is no error ("Extensibility").
    fn place(&mut self, name: &str) -> Option<&mut dyn Place>;
}

pub(super) fn read_object(object: &mut dyn Object, value: Value) -> Result<(), Misfit> {
    let Value::Object(members) = value else { return Err(Misfit::new("is not an object")) };
    for name in object.required() {
        if members.get(*name).is_none_or(Value::is_null) {
            return Err(Misfit::new("is required").within(name));
        }
    }
    for (name, value) in members {
        // Go writes what is empty as null.
        if !value.is_null()
            && let Some(place) = object.place(&name)
        {
            place.read(value).map_err(|misfit| misfit.within(&name))?;
        }
    }
    Ok(())
}

/// Names the members of a structure, all of its fields; those behind `required` must be there.
macro_rules! members {
    ($type:ident { $($($required:ident)? $name:literal: $field:ident),* $(,)? }) => {
        impl $crate::oci::json::Object for $type {
            fn required(&self) -> &'static [&'static str] {
                &[$($(members!(@ $required $name),)?)*]
            }

            fn place(&mut self, name: &str) -> Option<&mut dyn $crate::oci::json::Place> {
                let $type { $($field),* } = self;
                Some(match name {
                    $($name => $field,)*
                    _ => return None,
                })
            }
        }

        impl $crate::oci::json::Place for $type {
            fn read(&mut self, value: serde_json::Value) -> Result<(), $crate::oci::json::Misfit> {
                $crate::oci::json::read_object(self, value)
            }
        }
    };
    (@ required $name:literal) => { $name };
}

/// Names the values of an enumeration.
macro_rules! names {
    ($type:ident { $($name:literal: $variant:ident),* $(,)? }) => {
        impl $crate::oci::json::Place for $type {
            fn read(&mut self, value: serde_json::Value) -> Result<(), $crate::oci::json::Misfit> {
                *self = match value.as_str() {
                    $(Some($name) => $type::$variant,)*
                    _ => return Err($crate::oci::json::Misfit::new(format!("there is no {value}"))),
                };
                Ok(())
            }
        }
    };
}

pub(super) use {members, names};

impl Place for bool {
    fn read(&mut self, value: Value) -> Result<(), Misfit> {
        *self = value.as_bool().ok_or_else(|| Misfit::new("is neither true nor false"))?;
        Ok(())
    }
}

impl Place for String {
    fn read(&mut self, value: Value) -> Result<(), Misfit> {
        let Value::String(text) = value else { return Err(Misfit::new("is not a string")) };
        *self = text;
        Ok(())
    }
}

impl Place for PathBuf {
    fn read(&mut self, value: Value) -> Result<(), Misfit> {
        let mut text = String::new();
        text.read(value)?;
        *self = text.into();
        Ok(())
    }
}

impl Place for Value {
    fn read(&mut self, value: Value) -> Result<(), Misfit> {
        *self = value;
        Ok(())
    }
}

fn integer(value: &Value, (least, most): (i128, i128)) -> Result<i128, Misfit> {
    let number = value.as_i64().map(i128::from).or(value.as_u64().map(i128::from));
    number
        .filter(|number| (least..=most).contains(number))
        .ok_or_else(|| Misfit::new(format!("is not an integer from {least} to {most}")))
}

macro_rules! integers {
    ($($type:ty)*) => {
        $(impl Place for $type {
            fn read(&mut self, value: Value) -> Result<(), Misfit> {
                let number = integer(&value, (<$type>::MIN.into(), <$type>::MAX.into()))?;
                // It is in range.
                *self = number.try_into().unwrap_or_default();
                Ok(())
            }
        })*
    };
}

integers! { u16 u32 u64 i32 i64 }

impl<T: Place + Default> Place for Option<T> {
    fn read(&mut self, value: Value) -> Result<(), Misfit> {
        self.insert(T::default()).read(value)
    }
}

/// An array or a map, which grows by empty places.
trait Grow {
    fn grow(&mut self, name: String) -> &mut dyn Place;
}

impl<T: Place + Default> Grow for Vec<T> {
    fn grow(&mut self, _: String) -> &mut dyn Place {
        self.push_mut(T::default())
    }
}

impl<T: Place + Default> Grow for BTreeMap<String, T> {
    fn grow(&mut self, name: String) -> &mut dyn Place {
        self.entry(name).or_default()
    }
}

impl<T: Place + Default> Place for Vec<T> {
    fn read(&mut self, value: Value) -> Result<(), Misfit> {
        let Value::Array(values) = value else { return Err(Misfit::new("is not an array")) };
        read_elements(
            self,
            &mut values.into_iter().enumerate().map(|(index, value)| (index.to_string(), value)),
        )
    }
}

impl<T: Place + Default> Place for BTreeMap<String, T> {
    fn read(&mut self, value: Value) -> Result<(), Misfit> {
        let Value::Object(members) = value else { return Err(Misfit::new("is not an object")) };
        read_elements(self, &mut members.into_iter())
    }
}

fn read_elements(
    collection: &mut dyn Grow,
    elements: &mut dyn Iterator<Item = (String, Value)>,
) -> Result<(), Misfit> {
    for (name, value) in elements {
        let path = format!("[{name}]");
        collection.grow(name).read(value).map_err(|misfit| misfit.within(&path))?;
    }
    Ok(())
}
