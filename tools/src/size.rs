//! Byte counts as people write and read them: binary suffixes, no fractions in, one digit out.

use blockd::api::types::NewSize;

/// Suffixes by power of 1024.
const SUFFIXES: [char; 4] = ['k', 'm', 'g', 't'];

/// Reads `4096`, `4k`, `10M`, `1G` or `64TiB`: whole numbers, suffixes in either case and by powers
/// of 1024.
///
/// # Errors
/// Says what was expected.
pub fn parse(text: &str) -> Result<u64, String> {
    let digits = text.find(|c: char| !c.is_ascii_digit()).unwrap_or(text.len());
    let (number, suffix) = text.split_at(digits);
    let expected = || format!("`{text}` is no size: a whole number, then k, M, G, T or nothing");
    let number: u64 = number.parse().map_err(|_| expected())?;
    let suffix = suffix.to_ascii_lowercase();
    let unit = suffix.strip_suffix("ib").unwrap_or(&suffix);
    let power = match unit.chars().next() {
        None if suffix.is_empty() => 0,
        Some(c) if unit.len() == 1 => {
            SUFFIXES.iter().position(|s| *s == c).ok_or_else(expected)? + 1
        }
        _ => return Err(expected()),
    };
    let scaled = number.checked_mul(1 << (10 * power));
    scaled.ok_or_else(|| format!("`{text}` is more than 64 bits can count"))
}

/// Reads a size to change to, with an optional `+` or `-` before it.
///
/// # Errors
/// As [`parse`].
pub fn parse_new(text: &str) -> Result<NewSize, String> {
    match text.split_at_checked(1) {
        Some(("+", rest)) => parse(rest).map(NewSize::Grow),
        Some(("-", rest)) => parse(rest).map(NewSize::Shrink),
        _ => parse(text).map(NewSize::To),
    }
}

/// `bytes` for people: `512 B`, `4 KiB`, `1.5 GiB`. Rounded to one digit, downwards.
#[must_use]
pub fn show(bytes: u64) -> String {
    let mut power = 0;
    while power < SUFFIXES.len() && bytes >> (10 * (power + 1)) > 0 {
        power += 1;
    }
    let Some(suffix) = power.checked_sub(1).map(|i| SUFFIXES[i].to_ascii_uppercase()) else {
        return format!("{bytes} B");
    };
    let unit = 1_u64 << (10 * power);
    let tenths = u128::from(bytes % unit) * 10 / u128::from(unit);
    match tenths {
        0 => format!("{} {suffix}iB", bytes / unit),
        _ => format!("{}.{tenths} {suffix}iB", bytes / unit),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn suffixes_are_powers_of_1024_in_either_case() {
        for (text, bytes) in [
            ("0", 0),
            ("4096", 4096),
            ("4k", 4096),
            ("4K", 4096),
            ("4KiB", 4096),
            ("10M", 10 << 20),
            ("1g", 1 << 30),
            ("64T", 64 << 40),
        ] {
            assert_eq!(parse(text), Ok(bytes), "{text}");
        }
    }

    #[test]
    fn what_is_no_size_is_refused() {
        for text in ["", "k", "-1", "1.5G", "4x", "4kk", "4ibk", "4ib", "1 k", "99999999999999T"] {
            assert!(parse(text).is_err(), "{text}");
        }
    }

    #[test]
    fn a_sign_makes_a_size_relative() {
        assert_eq!(parse_new("+1k").unwrap().of(1024), Some(2048));
        assert_eq!(parse_new("-1k").unwrap().of(1024), Some(0));
        assert_eq!(parse_new("-1k").unwrap().of(1023), None);
        assert_eq!(parse_new("1k").unwrap().of(7), Some(1024));
        assert!(parse_new("+").is_err());
        assert!(parse_new("").is_err());
    }

    #[test]
    fn shown_sizes_never_say_more_than_there_is() {
        for (bytes, text) in [
            (0, "0 B"),
            (1023, "1023 B"),
            (1024, "1 KiB"),
            (1536, "1.5 KiB"),
            ((1 << 30) - 1, "1023.9 MiB"),
            (u64::MAX, "16777215.9 TiB"),
        ] {
            assert_eq!(show(bytes), text);
        }
    }
}
