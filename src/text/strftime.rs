//! Dates as chat templates ask for them (`strftime_now`), in UTC.

use std::fmt::Write;

const MONTHS: [&str; 12] = [
    "January",
    "February",
    "March",
    "April",
    "May",
    "June",
    "July",
    "August",
    "September",
    "October",
    "November",
    "December",
];
const DAYS: [&str; 7] = [
    "Thursday",
    "Friday",
    "Saturday",
    "Sunday",
    "Monday",
    "Tuesday",
    "Wednesday",
];

/// Formats a time in seconds since 1970 by the common codes of C's `strftime`.
/// A code that is not known stays as it is.
pub(super) fn strftime(format: &str, unix_s: u64) -> String {
    let (days, second) = (unix_s / 86400, unix_s % 86400);
    let (hour, minute) = (second / 3600, second / 60 % 60);
    let (mut year, mut day) = (1970, days);
    while day >= year_days(year) {
        day -= year_days(year);
        year += 1;
    }
    let day_of_year = day + 1;
    let mut month = 0;
    while day >= month_days(year, month) {
        day -= month_days(year, month);
        month += 1;
    }
    let (name, weekday) = (MONTHS[month], DAYS[(days % 7) as usize]);
    let (month, day, hour12) = (month + 1, day + 1, (hour + 11) % 12 + 1);
    let mut text = String::new();
    let mut chars = format.chars();
    while let Some(c) = chars.next() {
        let code = if c == '%' { chars.next() } else { None };
        let written = match code {
            Some('Y') => write!(text, "{year}"),
            Some('y') => write!(text, "{:02}", year % 100),
            Some('m') => write!(text, "{month:02}"),
            Some('B') => write!(text, "{name}"),
            Some('b' | 'h') => write!(text, "{}", &name[..3]),
            Some('d') => write!(text, "{day:02}"),
            Some('e') => write!(text, "{day:2}"),
            Some('j') => write!(text, "{day_of_year:03}"),
            Some('A') => write!(text, "{weekday}"),
            Some('a') => write!(text, "{}", &weekday[..3]),
            Some('H') => write!(text, "{hour:02}"),
            Some('I') => write!(text, "{hour12:02}"),
            Some('M') => write!(text, "{minute:02}"),
            Some('S') => write!(text, "{:02}", second % 60),
            Some('p') => write!(text, "{}", if hour < 12 { "AM" } else { "PM" }),
            Some('F') => write!(text, "{year}-{month:02}-{day:02}"),
            Some('T') => write!(text, "{hour:02}:{minute:02}:{:02}", second % 60),
            Some('%') => write!(text, "%"),
            Some(other) => write!(text, "%{other}"),
            None => write!(text, "{c}"),
        };
        written.expect("writing to a string cannot fail");
    }
    text
}

fn is_leap(year: u64) -> bool {
    year.is_multiple_of(4) && (!year.is_multiple_of(100) || year.is_multiple_of(400))
}

fn year_days(year: u64) -> u64 {
    if is_leap(year) { 366 } else { 365 }
}

/// Days of the month, 0 for January.
fn month_days(year: u64, month: usize) -> u64 {
    match month {
        1 if is_leap(year) => 29,
        1 => 28,
        3 | 5 | 8 | 10 => 30,
        _ => 31,
    }
}

#[cfg(test)]
mod tests {
    use super::strftime;

    #[test]
    fn known_dates() {
        assert_eq!(strftime("%d %b %Y", 1721952000), "26 Jul 2024");
        assert_eq!(
            strftime("%A, %B %e, %Y %I:%M:%S %p", 951782400),
            "Tuesday, February 29, 2000 12:00:00 AM"
        );
        assert_eq!(
            strftime("%F %T %j %a %y %%q %Q%", 4107542399),
            "2100-02-28 23:59:59 059 Sun 00 %q %Q%"
        );
    }
}
