// How rank numbers are listed in messages, so that one about a thousand ranks stays readable.

/**
 * Writes numbers as ranges: `0, 3 to 5`.
 *
 * @param numbers Whole numbers, ascending.
 * @returns The text.
 */
export function rangesOf(numbers: readonly number[]): string {
  const parts: string[] = [];
  for (let i = 0; i < numbers.length;) {
    let j = i;
    while (j + 1 < numbers.length && numbers[j + 1] === numbers[j] + 1) j++;
    if (j - i < 2) { for (; i <= j; i++) parts.push(String(numbers[i])); }
    else parts.push(`${numbers[i]} to ${numbers[j]}`);
    i = j + 1;
  }
  return parts.join(", ");
}
