package remote

import (
	"fmt"
	"path/filepath"
	"strings"

	"github.com/google/go-containerregistry/pkg/name"
	v1 "github.com/google/go-containerregistry/pkg/v1"
)

// Kind is the kind of place that a [Reference] points to.
type Kind uint8

const (
	Registry Kind = iota + 1 // a repository of a registry
	Layout                   // a directory that is an OCI image layout
	Archive                  // a tar file as docker save writes it
)

// A Reference names one image, or one index of images, and where it lies. It is
// made by [ParseReference].
type Reference struct {
	text   string
	kind   Kind
	path   string
	tag    string
	digest v1.Hash // of a Layout or Archive; zero if not given
	name   name.Reference
}

const (
	layoutPrefix  = "oci:"
	archivePrefix = "docker-archive:"
)

// ParseReference parses what a user types:
//
//	debian:12                          docker's syntax, with docker's defaults
//	127.0.0.1:5000/py@sha256:…         also with docker:// before it
//	oci:DIR, oci:DIR:TAG               an OCI image layout
//	oci:DIR@sha256:…
//	docker-archive:FILE                a tar file written by docker save
//	docker-archive:FILE:TAG            TAG may be a whole name such as py:3.12
//
// DIR and FILE end at their first colon. Nothing is looked at: that there is
// such an image shows when it is read.
func ParseReference(s string) (Reference, error) {
	r := Reference{text: s}
	rest, ok := strings.CutPrefix(s, layoutPrefix)
	if ok {
		r.kind = Layout
	} else if rest, ok = strings.CutPrefix(s, archivePrefix); ok {
		r.kind = Archive
	} else {
		// Other tools write docker:// before it; without this line that would be a host named "docker".
		n, err := name.ParseReference(strings.TrimPrefix(s, "docker://"))
		if err != nil {
			return Reference{}, fmt.Errorf("image %q: not a reference: want NAME[:TAG], oci:DIR[:TAG] or docker-archive:FILE[:TAG]: %w", s, err)
		}
		r.kind, r.name = Registry, n
		return r, nil
	}
	if i := strings.LastIndex(rest, "@sha256:"); i >= 0 {
		h, err := v1.NewHash(rest[i+1:])
		if err != nil {
			return Reference{}, fmt.Errorf("image %q: the digest must be sha256: and 64 hexadecimal digits", s)
		}
		r.digest, rest = h, rest[:i]
	}
	r.path, r.tag, ok = strings.Cut(rest, ":")
	if r.path == "" || ok && r.tag == "" {
		return Reference{}, fmt.Errorf("image %q: want oci:DIR[:TAG] or docker-archive:FILE[:TAG]", s)
	}
	return r, nil
}

// String returns the reference as it was typed.
func (r Reference) String() string { return r.text }

// Kind returns where the image lies. It is 0 for the zero Reference.
func (r Reference) Kind() Kind { return r.kind }

// Path returns the directory of a Layout or the file of an Archive, else "".
func (r Reference) Path() string { return r.path }

// Tag returns the tag that a Layout or Archive reference names, or "".
func (r Reference) Tag() string { return r.tag }

// Name returns the name of an image in a registry, with docker's defaults filled
// in, and nil for the other kinds.
func (r Reference) Name() name.Reference { return r.name }

// At returns a reference to what lies at the same place and has the digest, whatever tag r names.
func (r Reference) At(digest v1.Hash) Reference {
	switch r.kind {
	case Registry:
		r.name = r.name.Context().Digest(digest.String())
		r.text = r.name.String()
	case Layout, Archive:
		prefix := layoutPrefix
		if r.kind == Archive {
			prefix = archivePrefix
		}
		r.tag, r.digest = "", digest
		r.text = prefix + r.path + "@" + digest.String()
	}
	return r
}

// Abs returns r with its path, if it has one, made absolute: so that it means the same to another process.
func (r Reference) Abs() (Reference, error) {
	if r.kind != Layout && r.kind != Archive {
		return r, nil
	}
	path, err := filepath.Abs(r.path)
	if err != nil {
		return r, err
	}
	prefix := layoutPrefix
	if r.kind == Archive {
		prefix = archivePrefix
	}
	r.text = prefix + path + strings.TrimPrefix(r.text, prefix+r.path)
	r.path = path
	return r, nil
}
