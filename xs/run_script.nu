# Runs the script.nu beside it, and writes what it yields, value by value.
#
# Its input comes on file descriptor 3: nothing, bytes, or a frame as JSON. On standard output each
# line of ours begins with a mark that no script can guess, since a script's own `print` goes there
# too: first "start", then the kind of what the script yields, then a line for each value: S and a
# string as JSON, B and bytes in base64, or J and any other value as JSON (also one that JSON has no
# type for, such as a time). Text and bytes that are all that it yields, "string (stream)" and
# "binary (stream)", come in pieces, a line each, since Nushell has long ones in pieces. A "byte
# stream", of an external command or a file, follows its kind as it is.

use xs.nu *

def xs-script [] { source script.nu }

# An error within a stream is a value in it: `str join` raises it, `to text` would print it.
def xs-values [] {
  each {|value|
    match ($value | describe) {
      "binary" => { let text = ($value | encode base64); $"($env.XS_MARK)B($text)\n" }
      "string" => { let text = ($value | to json --raw); $"($env.XS_MARK)S($text)\n" }
      _ => { let text = ($value | to json --raw); $"($env.XS_MARK)J($text)\n" }
    }
  } | str join | print --raw --no-newline
}

def xs-answer [] {
  tee {
    let kind = (describe --no-collect)
    print $"($env.XS_MARK)($kind)"
    $kind | job send 0 --tag 8
  } | xs-by-kind (job recv --tag 8)
}

def xs-by-kind [kind: string] {
  if $kind == "nothing" { } else if $kind == "byte stream" {
    skip 0 | print --raw --no-newline # `print` alone would hide from 0.115 that a command has failed
  } else { xs-values }
}

def main [input: string] {
  print $"($env.XS_MARK)start"
  if $input == "frame" {
    open --raw /dev/fd/3 | from json | xs-script | xs-answer
  } else if $input == "bytes" {
    open --raw /dev/fd/3 | xs-script | xs-answer
  } else {
    xs-script | xs-answer
  }
  # As what `main` yields, an external command's output would hide from 0.109 that it has failed.
  null
}
