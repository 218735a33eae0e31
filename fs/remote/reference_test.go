package remote

import (
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
)

func TestParseReference(t *testing.T) {
	digest := "sha256:" + strings.Repeat("ab", 32)
	type parsed struct {
		Kind            Kind
		Path, Tag, Name string
	}
	for s, want := range map[string]parsed{
		"debian:12":                          {Kind: Registry, Name: "index.docker.io/library/debian:12"},
		"docker://debian:12":                 {Kind: Registry, Name: "index.docker.io/library/debian:12"},
		"debian":                             {Kind: Registry, Name: "index.docker.io/library/debian:latest"},
		"127.0.0.1:5000/py@" + digest:        {Kind: Registry, Name: "127.0.0.1:5000/py@" + digest},
		"ghcr.io/a/b:c@" + digest:            {Kind: Registry, Name: "ghcr.io/a/b@" + digest},
		"oci:dir":                            {Kind: Layout, Path: "dir"},
		"oci:/a/b:tag":                       {Kind: Layout, Path: "/a/b", Tag: "tag"},
		"oci:/a/b@" + digest:                 {Kind: Layout, Path: "/a/b"},
		"oci:/a@b:tag":                       {Kind: Layout, Path: "/a@b", Tag: "tag"},
		"docker-archive:a.tar":               {Kind: Archive, Path: "a.tar"},
		"docker-archive:a.tar:py:3.12":       {Kind: Archive, Path: "a.tar", Tag: "py:3.12"},
		"docker-archive:/x/a.tar:h:1/py:3.1": {Kind: Archive, Path: "/x/a.tar", Tag: "h:1/py:3.1"},
	} {
		r, err := ParseReference(s)
		if err != nil {
			t.Error(err)
			continue
		}
		got := parsed{Kind: r.Kind(), Path: r.Path(), Tag: r.Tag()}
		if r.Name() != nil {
			got.Name = r.Name().Name()
		}
		if d := cmp.Diff(want, got); d != "" {
			t.Errorf("%s:\n%s", s, d)
		}
		if r.String() != s {
			t.Errorf("String: %q, want %q", r, s)
		}
	}
	for _, s := range []string{"", "UPPER", "a b", "oci:", "oci::tag", "oci:dir:", "docker-archive:", "oci:dir@sha256:abc", "docker://", "debian:12@sha256:12"} {
		if r, err := ParseReference(s); err == nil {
			t.Errorf("%q: %+v, want an error", s, r)
		} else if !strings.Contains(err.Error(), "image ") {
			t.Errorf("%q: error %v does not name the image", s, err)
		}
	}
	if _, err := Open(t.Context(), Reference{}, Options{}); err == nil {
		t.Error("the zero Reference was opened")
	}
}
