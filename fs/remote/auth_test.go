package remote

import (
	"testing"

	"github.com/google/go-cmp/cmp"
)

func TestParseChallenge(t *testing.T) {
	type p = map[string]string
	for _, tt := range []struct {
		headers []string
		want    *challenge
	}{
		{nil, nil},
		{[]string{""}, nil},
		{[]string{"Negotiate"}, nil},
		{[]string{`Basic realm="x"`}, &challenge{"basic", p{"realm": "x"}}},
		{[]string{`Basic`}, &challenge{"basic", p{}}},
		{[]string{`Bearer realm="https://a/t",service="s",scope="repository:a/b:pull,push"`}, &challenge{"bearer", p{"realm": "https://a/t", "service": "s", "scope": "repository:a/b:pull,push"}}},
		{[]string{`bearer Realm = "https://a/t" , service=s`}, &challenge{"bearer", p{"realm": "https://a/t", "service": "s"}}},
		{[]string{`Negotiate, Basic realm="x", Bearer realm="y"`}, &challenge{"bearer", p{"realm": "y"}}},
		{[]string{`Basic realm="x"`, `Bearer realm="y"`}, &challenge{"bearer", p{"realm": "y"}}},
		{[]string{`Bearer`, `Basic realm="x"`}, &challenge{"basic", p{"realm": "x"}}},
		{[]string{`Bearer realm="a \"b\" \\c"`}, &challenge{"bearer", p{"realm": `a "b" \c`}}},
		{[]string{`Bearer realm="open`}, &challenge{"bearer", p{"realm": "open"}}},
		{[]string{`"quoted", Basic`}, nil},
	} {
		if d := cmp.Diff(tt.want, parseChallenge(tt.headers), cmp.AllowUnexported(challenge{})); d != "" {
			t.Errorf("%q:\n%s", tt.headers, d)
		}
	}
}

func FuzzParseChallenge(f *testing.F) {
	f.Add(`Bearer realm="https://a/t",service="s",scope="repository:a/b:pull,push"`)
	f.Add(`Negotiate, Basic realm="x\`)
	f.Add(`Basic realm = , ,x=,Bearer a="`)
	f.Fuzz(func(t *testing.T, s string) {
		c := parseChallenge([]string{s}) // must return
		if c != nil && c.scheme != "basic" && c.scheme != "bearer" {
			t.Errorf("%q: scheme %q", s, c.scheme)
		}
		n := 0
		if c != nil {
			for k, v := range c.parameters {
				n += len(k) + len(v)
			}
		}
		if n > 3*len(s) { // lower case may be longer
			t.Errorf("%d bytes of parameters from %d", n, len(s))
		}
	})
}

func FuzzContentRange(f *testing.F) {
	f.Add("bytes 1-2/10")
	f.Add("bytes 1-2/*")
	f.Add("bytes 1-1/3,4-5/6")
	f.Fuzz(func(t *testing.T, s string) {
		if err := checkContentRange(s, 3, 4, 10); err == nil && s[:9] != "bytes 3-6" {
			t.Errorf("%q: taken for bytes 3 to 6", s)
		}
	})
}
