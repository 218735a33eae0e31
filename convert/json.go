package convert

import (
	"bytes"
	"encoding/json"
)

// An object is a JSON object of which some fields are changed and all others kept as they came,
// those that no specification knows included.
type object map[string]json.RawMessage

func parseObject(raw []byte) (object, error) {
	var o object
	if err := json.Unmarshal(raw, &o); err != nil {
		return nil, err
	}
	if o == nil {
		o = object{}
	}
	return o, nil
}

// set sets a field to v, which can be written as JSON.
func (o object) set(key string, v any) {
	raw, err := encodeJSON(v)
	if err != nil {
		panic(err) // v is made here, of strings, numbers and objects
	}
	o[key] = raw
}

// annotate adds annotations to those that are there.
func (o object) annotate(add map[string]string) error {
	all := map[string]string{}
	if raw, ok := o["annotations"]; ok {
		if err := json.Unmarshal(raw, &all); err != nil {
			return err
		}
	}
	if all == nil {
		all = map[string]string{}
	}
	for k, v := range add {
		all[k] = v
	}
	o.set("annotations", all)
	return nil
}

// bytes returns the JSON, with the fields in the order of their names.
func (o object) bytes() ([]byte, error) { return encodeJSON(o) }

func encodeJSON(v any) ([]byte, error) {
	var buf bytes.Buffer
	e := json.NewEncoder(&buf)
	e.SetEscapeHTML(false)
	if err := e.Encode(v); err != nil {
		return nil, err
	}
	return bytes.TrimSuffix(buf.Bytes(), []byte("\n")), nil
}
