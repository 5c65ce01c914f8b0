//! Names of virtual machines: one path component, so that a name can never leave its root.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

/// Longest name, in bytes: bhyve's VM_MAX_NAMELEN of 2012, less its NUL.
pub const MAX_LEN: usize = 31;

/// A valid name: 1 to 31 of `A-Z a-z 0-9 . _ -`, not beginning with a dot or a dash.
///
/// A leading dash is refused because such a name could be given to no program as an argument.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct VmName(String);

/// Why a text is not a VM name.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum NameError {
    /// The text is empty.
    #[error("a VM needs a name: 1 to {MAX_LEN} of A-Z a-z 0-9 . _ -")]
    Empty,
    /// The text has more than [`MAX_LEN`] bytes.
    #[error("VM name '{0}' has {1} bytes: at most {MAX_LEN} are allowed")]
    TooLong(String, usize),
    /// The text has a character that no name may have.
    #[error("VM name '{0}' has a {1:?}: only A-Z a-z 0-9 . _ - are allowed")]
    BadCharacter(String, char),
    /// The text begins with a dot or a dash.
    #[error("VM name '{0}' begins with {1:?}: begin it with a letter or a digit")]
    BadStart(String, char),
}

impl VmName {
    /// The name as text.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl FromStr for VmName {
    type Err = NameError;

    fn from_str(s: &str) -> Result<Self, NameError> {
        let allowed = |c: char| c.is_ascii_alphanumeric() || matches!(c, '.' | '_' | '-');
        let Some(first) = s.chars().next() else {
            return Err(NameError::Empty);
        };
        if s.len() > MAX_LEN {
            return Err(NameError::TooLong(s.to_owned(), s.len()));
        }
        if let Some(bad) = s.chars().find(|&c| !allowed(c)) {
            return Err(NameError::BadCharacter(s.to_owned(), bad));
        }
        if matches!(first, '.' | '-') {
            return Err(NameError::BadStart(s.to_owned(), first));
        }
        Ok(Self(s.to_owned()))
    }
}

impl TryFrom<String> for VmName {
    type Error = NameError;

    fn try_from(s: String) -> Result<Self, NameError> {
        s.parse()
    }
}

impl From<VmName> for String {
    fn from(name: VmName) -> Self {
        name.0
    }
}

impl fmt::Display for VmName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(&self.0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_of_all_allowed_characters_are_taken() {
        for name in ["a", "guest0", "A.b_c-9", &"x".repeat(31)] {
            assert_eq!(name.parse::<VmName>().unwrap().as_str(), name);
        }
    }

    #[test]
    fn each_bad_name_says_what_is_wrong_with_it() {
        let err = |s: &str| s.parse::<VmName>().unwrap_err();
        assert_eq!(err(""), NameError::Empty);
        assert_eq!(err("a/b"), NameError::BadCharacter("a/b".into(), '/'));
        assert_eq!(err("né"), NameError::BadCharacter("né".into(), 'é'));
        assert_eq!(err(".."), NameError::BadStart("..".into(), '.'));
        assert_eq!(err("-c"), NameError::BadStart("-c".into(), '-'));
        assert_eq!(err(&"x".repeat(32)), NameError::TooLong("x".repeat(32), 32));
    }

    proptest::proptest! {
        #[test]
        fn an_accepted_name_is_one_path_component(s in ".{0,40}") {
            if let Ok(name) = s.parse::<VmName>() {
                let path = std::path::Path::new(name.as_str());
                proptest::prop_assert_eq!(path.components().count(), 1);
                let first = path.components().next();
                proptest::prop_assert!(matches!(first, Some(std::path::Component::Normal(_))));
            }
        }
    }
}
