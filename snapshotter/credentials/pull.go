package credentials

import (
	"errors"
	"net/url"
	"slices"
	"unicode/utf8"

	"github.com/google/go-containerregistry/pkg/authn"
	"github.com/google/go-containerregistry/pkg/name"
	"google.golang.org/protobuf/encoding/protowire"
)

// A pull is what a CRI PullImageRequest says about an image and its credentials. Fields that
// are missing are "".
type pull struct {
	image string

	username, password, auth     string
	serverAddress                string
	identityToken, registryToken string
}

// parsePull reads a PullImageRequest of runtime.v1 or runtime.v1alpha2; the two are the same here. It is decoded by
// hand because the fields are few and do not change, while the API's package brings all of Kubernetes' types.
func parsePull(b []byte) (p pull, err error) {
	err = fields(b, func(n protowire.Number, b []byte) error {
		switch n {
		case 1: // image
			return texts(b, map[protowire.Number]*string{1: &p.image})
		case 2: // auth
			return texts(b, map[protowire.Number]*string{
				1: &p.username, 2: &p.password, 3: &p.auth,
				4: &p.serverAddress, 5: &p.identityToken, 6: &p.registryToken,
			})
		}
		return nil
	})
	return p, err
}

var errWire = errors.New("not a PullImageRequest")

// fields calls found with the fields of a message that are bytes, strings or messages, in the order they come
// in. As protobuf wants it, the last of a string counts, and messages that come several times are merged.
func fields(b []byte, found func(protowire.Number, []byte) error) error {
	for len(b) > 0 {
		n, kind, size := protowire.ConsumeTag(b)
		if size < 0 || n > protowire.MaxValidNumber {
			return errWire
		}
		b = b[size:]
		size = protowire.ConsumeFieldValue(n, kind, b)
		if size < 0 {
			return errWire
		}
		if kind == protowire.BytesType {
			value, _ := protowire.ConsumeBytes(b)
			if err := found(n, value); err != nil {
				return err
			}
		}
		b = b[size:]
	}
	return nil
}

// texts reads strings of a message.
func texts(b []byte, into map[protowire.Number]*string) error {
	return fields(b, func(n protowire.Number, value []byte) error {
		s, ok := into[n]
		if !ok {
			return nil
		}
		if !utf8.Valid(value) {
			return errWire
		}
		*s = string(value)
		return nil
	})
}

// config returns the credentials that containerd would use, so that what a pull worked with is what is
// kept: the user name and password, else the identity token, else auth. containerd does not look at the
// registry token; here it is used if there is nothing else.
func (p pull) config() authn.AuthConfig {
	switch {
	case p.username != "":
		return authn.AuthConfig{Username: p.username, Password: p.password}
	case p.identityToken != "":
		return authn.AuthConfig{IdentityToken: p.identityToken}
	case p.auth != "":
		return authn.AuthConfig{Auth: p.auth}
	}
	return authn.AuthConfig{RegistryToken: p.registryToken}
}

// dockerHub has the names of its registry: the one that references get here, the one that users write, and the
// one that containerd speaks to.
var dockerHub = []string{name.DefaultRegistry, "docker.io", "registry-1.docker.io"}

// misdirected reports whether the credentials are for another server than the image's. containerd does not
// use them then.
func (p pull) misdirected() bool {
	if p.serverAddress == "" {
		return false
	}
	ref, err := name.ParseReference(p.image)
	if err != nil {
		return false // it has no server; who wants to keep it finds out
	}
	u, err := url.Parse(p.serverAddress)
	if err != nil {
		return true
	}
	host := ref.Context().RegistryStr()
	return u.Host != host && !(host == name.DefaultRegistry && slices.Contains(dockerHub, u.Host))
}
