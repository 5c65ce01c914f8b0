//! Days and dates of the Gregorian calendar, for the CMOS clock.

/// A date.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Date {
    pub year: i64,
    /// 1 to 12.
    pub month: u8,
    /// 1 to 31.
    pub day: u8,
    /// 1 to 7, from Sunday on.
    pub weekday: u8,
}

/// Days from 1970-01-01 back to 0000-03-01, where leap days fall at the end of the year.
const TO_MARCH_0: i64 = 719_468;
/// Days in 400 years.
const ERA: i64 = 146_097;

impl Date {
    /// The date `days` days after 1970-01-01.
    pub(super) fn from_days(days: i64) -> Self {
        let march = days + TO_MARCH_0;
        let of_era = march.rem_euclid(ERA);
        // Without its leap days so far, each year has 365.
        let year_of_era = (of_era - of_era / 1460 + of_era / 36_524 - of_era / 146_096) / 365;
        let of_year = of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
        // From March on, months have 31, 30, 31, 30, 31 days, and again: 153 days in five.
        let from_march = (5 * of_year + 2) / 153;
        let day = of_year - (153 * from_march + 2) / 5 + 1;
        let month = if from_march < 10 {
            from_march + 3
        } else {
            from_march - 9
        };
        let year = march.div_euclid(ERA) * 400 + year_of_era + i64::from(month <= 2);
        // 1970-01-01 was a Thursday.
        let weekday = (days + 4).rem_euclid(7) + 1;
        Self {
            year,
            month: month as u8,
            day: day as u8,
            weekday: weekday as u8,
        }
    }

    /// Days from 1970-01-01. A month or a day that does not exist counts on from the one before.
    pub(super) fn to_days(self) -> i64 {
        let month = i64::from(self.month.clamp(1, 12));
        let year = if month <= 2 { self.year - 1 } else { self.year };
        let from_march = (month + 9) % 12;
        let of_year = (153 * from_march + 2) / 5 + i64::from(self.day) - 1;
        let (era, year_of_era) = (year.div_euclid(400), year.rem_euclid(400));
        let of_era = 365 * year_of_era + year_of_era / 4 - year_of_era / 100 + of_year;
        era * ERA + of_era - TO_MARCH_0
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn known_dates() {
        for (days, year, month, day, weekday) in [
            (0, 1970, 1, 1, 5),
            (11_016, 2000, 2, 29, 3),
            (15_440, 2012, 4, 10, 3),
            (47_540, 2100, 2, 28, 1),
            (47_541, 2100, 3, 1, 2),
        ] {
            let date = Date {
                year,
                month,
                day,
                weekday,
            };
            assert_eq!(Date::from_days(days), date);
            assert_eq!(date.to_days(), days);
        }
    }

    #[test]
    fn every_day_follows_the_one_before() {
        let mut last = Date::from_days(-200_000);
        for days in -199_999..200_000 {
            let date = Date::from_days(days);
            assert_eq!(date.to_days(), days);
            assert_eq!(date.weekday, last.weekday % 7 + 1);
            let next_day = date.month == last.month && date.day == last.day + 1;
            assert!(next_day || date.day == 1 && last.day >= 28);
            last = date;
        }
    }
}
