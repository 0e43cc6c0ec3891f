//! Metadata values.

/// A metadata value. Whole numbers of all widths are kept as one kind; so are the floats.
#[derive(Clone, Debug, PartialEq)]
pub enum GgufValue {
    /// u8 to u64
    Unsigned(u64),
    /// i8 to i64
    Signed(i64),
    /// f32 and f64
    Float(f64),
    /// boolean
    Bool(bool),
    /// UTF-8 text
    String(String),
    /// values of one type
    Array(Vec<GgufValue>),
}

impl GgufValue {
    /// A whole number below 2³².
    pub fn as_u32(&self) -> Option<u32> {
        match self {
            Self::Unsigned(v) => u32::try_from(*v).ok(),
            Self::Signed(v) => u32::try_from(*v).ok(),
            _ => None,
        }
    }

    /// A whole number that fits 32 bits with sign.
    pub fn as_i32(&self) -> Option<i32> {
        match self {
            Self::Unsigned(v) => i32::try_from(*v).ok(),
            Self::Signed(v) => i32::try_from(*v).ok(),
            _ => None,
        }
    }

    /// A finite number.
    pub fn as_f32(&self) -> Option<f32> {
        let value = match self {
            Self::Float(v) => *v as f32,
            Self::Unsigned(v) => *v as f32,
            Self::Signed(v) => *v as f32,
            _ => return None,
        };
        value.is_finite().then_some(value)
    }

    /// A boolean.
    pub fn as_bool(&self) -> Option<bool> {
        match self {
            Self::Bool(v) => Some(*v),
            _ => None,
        }
    }

    /// Text.
    pub fn as_str(&self) -> Option<&str> {
        match self {
            Self::String(v) => Some(v),
            _ => None,
        }
    }

    /// A list.
    pub fn as_array(&self) -> Option<&[Self]> {
        match self {
            Self::Array(v) => Some(v),
            _ => None,
        }
    }

    /// The value in short, for people.
    pub fn describe(&self) -> String {
        match self {
            Self::Unsigned(v) => v.to_string(),
            Self::Signed(v) => v.to_string(),
            Self::Float(v) => v.to_string(),
            Self::Bool(v) => v.to_string(),
            Self::String(v) if v.chars().count() > 60 => {
                format!("{:?}…", v.chars().take(60).collect::<String>())
            }
            Self::String(v) => format!("{v:?}"),
            Self::Array(v) => match v.first() {
                Some(first) if !matches!(first, Self::Array(_)) => {
                    format!("a list of {}: {}, …", v.len(), first.describe())
                }
                _ => format!("a list of {}", v.len()),
            },
        }
    }
}
